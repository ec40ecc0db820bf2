# The TPU hosts act as this account and as nothing more. It has no key: only a machine that runs as it can use it.

locals {
  bucket_roles = toset([
    "roles/storage.objectUser",         # read, write, list and delete objects
    "roles/storage.legacyBucketReader", # Orbax reads the bucket's own settings (storage.buckets.get)
  ])

  project_roles = toset([
    "roles/logging.logWriter",
    "roles/monitoring.metricWriter",
  ])
}

resource "google_service_account" "tpu" {
  account_id   = "parallax-tpu"
  display_name = "Parallax TPU hosts"
  description  = "Writes one bucket, logs and metrics"

  depends_on = [google_project_service.required]
}

resource "google_storage_bucket_iam_member" "tpu" {
  for_each = local.bucket_roles

  bucket = google_storage_bucket.runs.name
  role   = each.key
  member = "serviceAccount:${google_service_account.tpu.email}"
}

resource "google_project_iam_member" "tpu" {
  for_each = local.project_roles

  project = var.project_id
  role    = each.key
  member  = "serviceAccount:${google_service_account.tpu.email}"
}
