# The TPU. It bills from its creation to its deletion, whether it trains or not.

locals {
  # By generation: the runtime image, and what images that fit look like.
  runtimes = {
    v2        = { default = "tpu-ubuntu2204-base", fits = "^tpu-" }
    v3        = { default = "tpu-ubuntu2204-base", fits = "^tpu-" }
    v4        = { default = "tpu-ubuntu2204-base", fits = "^tpu-" }
    v5litepod = { default = "v2-alpha-tpuv5-lite", fits = "^v2-alpha-tpuv5-lite" }
    v5p       = { default = "v2-alpha-tpuv5", fits = "^v2-alpha-tpuv5(-[^l].*)?$" }
    v6e       = { default = "v2-alpha-tpuv6e", fits = "^v2-alpha-tpuv6e" }
    tpu7x     = { default = "v2-alpha-tpu7-ubuntu2404", fits = "^v2-alpha-tpu7" }
  }
}

resource "google_tpu_v2_vm" "this" {
  provider = google-beta
  count    = var.create_tpu ? 1 : 0

  name             = var.tpu_name
  description      = "Parallax training; bills until it is deleted"
  zone             = var.zone
  accelerator_type = var.accelerator
  runtime_version  = coalesce(var.runtime, local.runtimes[local.generation].default)
  labels           = local.labels

  network_config {
    network             = google_compute_network.this.id
    subnetwork          = google_compute_subnetwork.this.id
    enable_external_ips = false
    can_ip_forward      = false
  }

  service_account {
    email = google_service_account.tpu.email
    scope = ["https://www.googleapis.com/auth/cloud-platform"] # the account's roles are the limit
  }

  dynamic "scheduling_config" {
    for_each = var.spot ? [true] : []

    content {
      spot = true
    }
  }

  lifecycle {
    ignore_changes = [metadata] # `gcloud … ssh` keeps the users' keys there
  }

  depends_on = [ # its first boot already downloads, logs and reads the bucket
    google_compute_firewall.ssh_from_iap,
    google_compute_router_nat.this,
    google_project_iam_member.tpu,
    google_storage_bucket_iam_member.tpu,
  ]
}
