# One bucket for code, logs, runs and checkpoints.

resource "google_storage_bucket" "runs" {
  #checkov:skip=CKV_GCP_62:usage logs would need a second bucket; Cloud Audit Logs can say who read what

  name                        = coalesce(var.bucket_name, "${var.project_id}-parallax")
  location                    = local.region
  storage_class               = "STANDARD"
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = false # `terraform destroy` must not take the checkpoints along
  labels                      = local.labels

  versioning {
    enabled = true
  }

  soft_delete_policy {
    retention_duration_seconds = 0 # versions already keep what was deleted; keeping it twice would be billed twice
  }

  lifecycle_rule {
    condition {
      days_since_noncurrent_time = var.old_version_days
      with_state                 = "ARCHIVED" # a version that is no longer the current one
    }
    action {
      type = "Delete"
    }
  }

  lifecycle_rule {
    condition {
      age = 1 # an upload that a killed process left open
    }
    action {
      type = "AbortIncompleteMultipartUpload"
    }
  }

  depends_on = [google_project_service.required]
}
