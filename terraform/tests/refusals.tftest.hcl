# A wrong value is refused before anything is planned, by the variable that it was given to.

mock_provider "google" {}
mock_provider "google-beta" {}

variables {
  project_id = "some-project"
}

run "a_project_with_capitals" {
  command         = plan
  expect_failures = [var.project_id]

  variables {
    project_id = "Some-Project"
  }
}

run "a_project_that_is_a_number" {
  command         = plan
  expect_failures = [var.project_id]

  variables {
    project_id = "123456789012"
  }
}

run "a_zone_that_is_a_region" {
  command         = plan
  expect_failures = [var.zone]

  variables {
    zone = "us-central1"
  }
}

run "a_zone_with_a_space" {
  command         = plan
  expect_failures = [var.zone]

  variables {
    zone = "us-central1-a "
  }
}

run "an_accelerator_of_no_generation" {
  command         = plan
  expect_failures = [var.accelerator]

  variables {
    accelerator = "v9-8"
  }
}

run "an_accelerator_called_v5e" {
  command         = plan
  expect_failures = [var.accelerator]

  variables {
    accelerator = "v5e-8"
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

run "a_runtime_with_a_space" {
  command         = plan
  expect_failures = [var.runtime]

  variables {
    runtime = "tpu ubuntu"
  }
}

run "a_tpu_name_with_a_hyphen_last" {
  command         = plan
  expect_failures = [var.tpu_name]

  variables {
    tpu_name = "my-tpu-"
  }
}

run "a_bucket_name_with_a_scheme" {
  command         = plan
  expect_failures = [var.bucket_name]

  variables {
    bucket_name = "gs://my-runs"
  }
}

run "old_version_days_of_none" {
  command         = plan
  expect_failures = [var.old_version_days]

  variables {
    old_version_days = 0
  }
}

run "old_version_days_and_a_half" {
  command         = plan
  expect_failures = [var.old_version_days]

  variables {
    old_version_days = 1.5
  }
}

run "labels_with_capitals" {
  command         = plan
  expect_failures = [var.labels]

  variables {
    labels = { Team = "Research" }
  }
}
