# A wrong value is refused before anything is planned, by the variable that it was given to.

mock_provider "google" {}
mock_provider "google-beta" {}

variables {
  project_id = "some-project"
}

run "values_of_the_wrong_form" {
  command         = plan
  expect_failures = [var.project_id, var.zone, var.accelerator, var.tpu_name, var.old_version_days, var.labels]

  variables {
    project_id       = "Some-Project"
    zone             = "us-central1" # a region
    accelerator      = "v9-8"
    tpu_name         = "my-tpu-"
    old_version_days = 0
    labels           = { Team = "research" }
  }
}

run "values_that_nearly_have_the_form" {
  command         = plan
  expect_failures = [var.project_id, var.zone, var.accelerator, var.tpu_name, var.old_version_days, var.labels]

  variables {
    project_id       = "123456789012" # a project's number
    zone             = "us-central1-a "
    accelerator      = "v5e-8" # Google says v5litepod
    tpu_name         = "8-cores"
    old_version_days = 1.5
    labels           = { team = "R&D" }
  }
}

run "a_bucket_by_its_address" {
  command         = plan
  expect_failures = [var.bucket_name]

  variables {
    bucket_name = "gs://my-runs"
  }
}

run "an_accelerator_without_size" {
  command         = plan
  expect_failures = [var.accelerator]

  variables {
    accelerator = "v3"
  }
}

run "an_accelerator_of_12_cores" {
  command         = plan
  expect_failures = [var.accelerator]

  variables {
    accelerator = "v3-12"
  }
}

run "an_accelerator_of_48_chips" {
  command         = plan
  expect_failures = [var.accelerator]

  variables {
    accelerator = "v6e-48"
  }
}

run "a_runtime_with_a_space" {
  command         = plan
  expect_failures = [var.runtime]

  variables {
    runtime = "tpu ubuntu"
  }
}

run "a_runtime_of_another_generation" {
  command         = plan
  expect_failures = [var.runtime]

  variables {
    runtime = "v2-alpha-tpuv6e"
  }
}

run "a_runtime_of_v5litepod_for_v5p" {
  command         = plan
  expect_failures = [var.runtime]

  variables {
    accelerator = "v5p-8"
    runtime     = "v2-alpha-tpuv5-lite"
  }
}

run "half_a_slice" {
  command         = plan
  expect_failures = [var.slices]

  variables {
    slices     = 1.5
    create_tpu = false
  }
}

run "several_slices_made_by_terraform" {
  command         = plan
  expect_failures = [var.slices]

  variables {
    slices = 2
  }
}
