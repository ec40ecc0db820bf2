# What one training run on Cloud TPU needs, and nothing else: a network without a way in, a bucket, an identity and,
# unless create_tpu is false, the TPU itself.

locals {
  region = replace(var.zone, "/-[^-]+$/", "") # everything is in the zone's region, so traffic to the bucket is free

  generation = split("-", var.accelerator)[0]
  labels     = merge({ app = "parallax", managed-by = "terraform" }, var.labels)

  services = toset([
    "cloudresourcemanager.googleapis.com", # grants on the project
    "compute.googleapis.com",
    "iam.googleapis.com",
    "iap.googleapis.com",
    "logging.googleapis.com",
    "monitoring.googleapis.com",
    "storage.googleapis.com",
    "tpu.googleapis.com",
  ])
}

provider "google" {
  project = var.project_id
  region  = local.region
  zone    = var.zone
}

provider "google-beta" {
  project = var.project_id
  region  = local.region
  zone    = var.zone
}

resource "google_project_service" "required" {
  for_each = local.services

  service            = each.key
  disable_on_destroy = false # the project may use it for something else
}
