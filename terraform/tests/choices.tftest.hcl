# What the variables change: where, what kind, and what is printed at the end.

mock_provider "google" {}
mock_provider "google-beta" {}

variables {
  project_id = "some-project"
}

run "no_tpu_when_none_is_asked_for" {
  command = apply

  variables {
    create_tpu = false
    spot       = true
  }

  assert {
    condition     = length(google_tpu_v2_vm.this) == 0 && output.tpu == null
    error_message = "A TPU was made."
  }

  assert {
    condition     = strcontains(output.next_commands, "launch.py up --project some-project --zone us-central1-a --name parallax-dev-tpu --accelerator v3-8 --spot --network parallax --subnetwork parallax --service-account ${google_service_account.tpu.email}\n")
    error_message = "The command that starts the TPU must carry every choice."
  }
}

run "spot_is_a_schedule" {
  command = plan

  variables {
    spot = true
  }

  assert {
    condition     = [for schedule in google_tpu_v2_vm.this[0].scheduling_config : schedule.spot] == [true]
    error_message = "spot=true did not reach the TPU."
  }
}

run "everything_follows_the_zone" {
  command = plan

  variables {
    zone        = "europe-west4-a"
    accelerator = "v3-32"
  }

  assert {
    condition = toset([
      google_compute_subnetwork.this.region,
      google_compute_router.this.region,
      google_compute_router_nat.this.region,
      google_storage_bucket.runs.location,
    ]) == toset(["europe-west4"])
    error_message = "Something is outside the TPU's region."
  }

  assert {
    condition     = google_tpu_v2_vm.this[0].zone == "europe-west4-a" && google_tpu_v2_vm.this[0].accelerator_type == "v3-32"
    error_message = "The TPU is not the one asked for."
  }
}

run "a_generation_brings_its_runtime" {
  command = apply

  variables {
    accelerator = "v5litepod-16"
  }

  assert {
    condition     = google_tpu_v2_vm.this[0].runtime_version == "v2-alpha-tpuv5-lite"
    error_message = "v5litepod does not boot another generation's image."
  }

  assert {
    condition     = strcontains(output.next_commands, "plan.py --topology v5e-16 ")
    error_message = "scripts/plan.py knows v5litepod as v5e."
  }
}

run "a_runtime_that_fits_is_taken" {
  command = plan

  variables {
    accelerator = "v5p-8"
    runtime     = "v2-alpha-tpuv5-next"
  }

  assert {
    condition     = google_tpu_v2_vm.this[0].runtime_version == "v2-alpha-tpuv5-next"
    error_message = "The runtime asked for is not the one taken."
  }
}

run "labels_are_added_to_ours" {
  command = plan

  variables {
    labels = { team = "research" }
  }

  assert {
    condition     = google_storage_bucket.runs.labels == tomap({ app = "parallax", managed-by = "terraform", team = "research" }) && google_tpu_v2_vm.this[0].labels == google_storage_bucket.runs.labels
    error_message = "Bucket and TPU must carry the project's labels and the user's."
  }
}

run "the_last_lines_say_what_to_type_and_what_it_costs" {
  command = apply

  variables {
    bucket_name      = "my-runs"
    old_version_days = 30
  }

  assert {
    condition     = output.bucket == "gs://my-runs" && strcontains(output.next_commands, " --service-account ${google_service_account.tpu.email} --bucket my-runs -- ")
    error_message = "The training command must name the bucket."
  }

  assert {
    condition     = google_storage_bucket.runs.lifecycle_rule[0].condition[0].days_since_noncurrent_time == 30
    error_message = "old_version_days did not reach the bucket."
  }

  assert {
    condition     = strcontains(output.next_commands, "tpu-vm ssh parallax-dev-tpu --project=some-project --zone=us-central1-a --worker=0 --tunnel-through-iap\n")
    error_message = "SSH works through Identity-Aware Proxy only, so the command must say so."
  }

  assert {
    condition     = endswith(output.next_commands, "launch.py down --project some-project --zone us-central1-a --name parallax-dev-tpu") && !strcontains(output.next_commands, "launch.py up")
    error_message = "The last command deletes the TPU; none makes a second one."
  }

  assert {
    condition     = strcontains(output.cost_warning, "parallax-dev-tpu (v3-8) bills from now until it is deleted") && endswith(output.cost_warning, "https://cloud.google.com/tpu/pricing")
    error_message = "The bill must be named, with the page of prices."
  }
}

run "several_slices_are_asked_for_by_launch" {
  command = apply

  variables {
    accelerator = "v5litepod-256"
    slices      = 2
    create_tpu  = false
  }

  assert {
    condition     = length(google_tpu_v2_vm.this) == 0
    error_message = "Terraform cannot make several slices as one."
  }

  assert {
    condition     = strcontains(output.next_commands, "plan.py --topology 2xv5e-256 ") && strcontains(output.next_commands, "launch.py up --project some-project --zone us-central1-a --name parallax-dev-tpu --slices 2 --accelerator v5litepod-256 ") && endswith(output.next_commands, " --slices 2") && strcontains(output.next_commands, "ssh parallax-dev-tpu-0 ")
    error_message = "Every command must know how many slices there are."
  }

  assert {
    condition     = [for allow in google_compute_firewall.peers.allow : "${allow.protocol}:${join(",", coalesce(allow.ports, []))}"] == ["tcp:"]
    error_message = "Slices reach each other over any TCP port of the subnet."
  }
}
