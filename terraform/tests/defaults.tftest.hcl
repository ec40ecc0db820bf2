# `terraform apply -var=project_id=…` alone. The providers are mocks: nothing is asked of Google.

mock_provider "google" {}
mock_provider "google-beta" {}

variables {
  project_id = "some-project"
}

run "nothing_has_an_external_address" {
  command = plan

  assert {
    condition     = alltrue([for tpu in google_tpu_v2_vm.this : tpu.network_config[0].enable_external_ips == false])
    error_message = "The TPU has an external address."
  }

  assert {
    condition     = google_compute_network.this.auto_create_subnetworks == false
    error_message = "The network makes subnets by itself, in every region."
  }

  assert {
    condition     = google_compute_subnetwork.this.private_ip_google_access == true
    error_message = "A TPU without an external address cannot reach the bucket."
  }

  assert {
    condition     = google_compute_router_nat.this.source_subnetwork_ip_ranges_to_nat == "LIST_OF_SUBNETWORKS" && google_compute_router_nat.this.nat_ip_allocate_option == "AUTO_ONLY"
    error_message = "NAT must serve the listed subnet and no other."
  }
}

run "only_iap_and_peers_come_in" {
  command = plan

  assert {
    condition     = google_compute_firewall.ssh_from_iap.source_ranges == tolist(["35.235.240.0/20"])
    error_message = "SSH is open to more than Identity-Aware Proxy."
  }

  assert {
    condition     = [for allow in google_compute_firewall.ssh_from_iap.allow : "${allow.protocol}:${join(",", allow.ports)}"] == ["tcp:22"]
    error_message = "Identity-Aware Proxy reaches more than SSH."
  }

  assert {
    condition     = google_compute_firewall.peers.source_ranges == tolist([google_compute_subnetwork.this.ip_cidr_range])
    error_message = "The ports between hosts are open beyond the subnet."
  }

  assert {
    condition     = [for allow in google_compute_firewall.peers.allow : "${allow.protocol}:${join(",", allow.ports)}"] == ["tcp:8471,8476,8482"]
    error_message = "The hosts need libtpu's two ports and JAX's coordinator, over TCP, and nothing else."
  }
}

run "the_bucket_is_closed_and_keeps_versions" {
  command = plan

  assert {
    condition     = google_storage_bucket.runs.name == "some-project-parallax"
    error_message = "The bucket's default name has changed: existing runs would be left behind."
  }

  assert {
    condition     = google_storage_bucket.runs.uniform_bucket_level_access == true && google_storage_bucket.runs.public_access_prevention == "enforced"
    error_message = "An object could be made public."
  }

  assert {
    condition     = google_storage_bucket.runs.force_destroy == false
    error_message = "terraform destroy would delete the checkpoints."
  }

  assert {
    condition     = google_storage_bucket.runs.versioning[0].enabled == true
    error_message = "A deleted checkpoint is gone at once."
  }

  assert {
    condition     = [for rule in google_storage_bucket.runs.lifecycle_rule : rule.condition[0].days_since_noncurrent_time if rule.action[0].type == "Delete"] == [7]
    error_message = "Exactly one rule deletes, and only versions that have been noncurrent for 7 days."
  }
}

run "the_account_does_no_more_than_it_must" {
  command = plan

  assert {
    condition     = toset([for grant in google_storage_bucket_iam_member.tpu : grant.role]) == toset(["roles/storage.objectUser", "roles/storage.legacyBucketReader"])
    error_message = "The account has other roles on the bucket."
  }

  assert {
    condition     = alltrue([for grant in google_storage_bucket_iam_member.tpu : grant.bucket == google_storage_bucket.runs.name])
    error_message = "The account has a role on another bucket."
  }

  assert {
    condition     = toset([for grant in google_project_iam_member.tpu : grant.role]) == toset(["roles/logging.logWriter", "roles/monitoring.metricWriter"])
    error_message = "The account has other roles on the project."
  }
}

run "the_grants_and_the_tpu_are_of_one_account" {
  command = apply # the account's address is known only then

  assert {
    condition     = toset([for grant in concat(values(google_storage_bucket_iam_member.tpu), values(google_project_iam_member.tpu)) : grant.member]) == toset(["serviceAccount:${google_service_account.tpu.email}"])
    error_message = "A role went to someone else."
  }

  assert {
    condition     = google_tpu_v2_vm.this[0].service_account[0].email == google_service_account.tpu.email
    error_message = "The TPU runs as another account."
  }

  assert {
    condition     = google_tpu_v2_vm.this[0].network_config[0].subnetwork == google_compute_subnetwork.this.id && one(google_compute_router_nat.this.subnetwork).name == google_compute_subnetwork.this.id
    error_message = "The TPU and NAT are not in the one subnet."
  }
}

run "one_v3_8_of_the_known_name" {
  command = plan

  assert {
    condition     = [for tpu in google_tpu_v2_vm.this : "${tpu.name} ${tpu.accelerator_type} ${tpu.zone} ${tpu.runtime_version}"] == ["parallax-dev-tpu v3-8 us-central1-a tpu-ubuntu2204-base"]
    error_message = "The default TPU has changed."
  }

  assert {
    condition     = length(google_tpu_v2_vm.this[0].scheduling_config) == 0
    error_message = "On-demand is the default: nobody should lose a TPU by default."
  }
}
