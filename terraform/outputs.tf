locals {
  several  = var.slices > 1
  topology = "${local.several ? "${var.slices}x" : ""}${replace(var.accelerator, "v5litepod", "v5e")}" # as scripts/plan.py calls it

  where = "--project ${var.project_id} --zone ${var.zone} --name ${var.tpu_name}${local.several ? " --slices ${var.slices}" : ""}"
  what = join(" ", compact([ # everything that it takes to make this TPU, the first time or after a preemption
    "${local.where} --accelerator ${var.accelerator}",
    var.runtime == null ? "" : "--runtime ${var.runtime}",
    var.spot ? "--spot" : "",
    "--network ${google_compute_network.this.name} --subnetwork ${google_compute_subnetwork.this.name}",
    "--service-account ${google_service_account.tpu.email}",
  ]))
}

output "bucket" {
  description = "Where runs, logs and checkpoints go."
  value       = "gs://${google_storage_bucket.runs.name}"
}

output "service_account" {
  description = "The account that the TPU hosts act as."
  value       = google_service_account.tpu.email
}

output "network" {
  description = "The network's name."
  value       = google_compute_network.this.name
}

output "subnetwork" {
  description = "The subnet's name."
  value       = google_compute_subnetwork.this.name
}

output "tpu" {
  description = "The TPU's name, or null where none was made."
  value       = one(google_tpu_v2_vm.this[*].name)
}

output "next_commands" {
  description = "What to type next, in the repository's root."
  value = join("\n", flatten([
    "# choose a layout; needs no TPU",
    "python scripts/plan.py --topology ${local.topology} --config small --batch-size 512 --seq-len 512",
    var.create_tpu ? [] : ["# start a TPU", "python scripts/launch.py up ${local.what}"],
    "# train on every host, and go on after a preemption",
    "python scripts/launch.py run ${local.what} --bucket ${google_storage_bucket.runs.name} -- --strategy mesh --config small",
    "# look at a host; there is no other way in than Identity-Aware Proxy",
    "gcloud alpha compute tpus tpu-vm ssh ${var.tpu_name}${local.several ? "-0" : ""} --project=${var.project_id} --zone=${var.zone} --worker=0 --tunnel-through-iap",
    "# stop the bill",
    "python scripts/launch.py down ${local.where}",
  ]))
}

output "cost_warning" {
  description = "What goes on costing money."
  value       = "${var.create_tpu ? "${var.tpu_name} (${var.accelerator}) bills from now until it is deleted" : "A TPU bills from its creation until it is deleted"}, whether it trains or not; NAT and the bucket bill too. Prices: https://cloud.google.com/tpu/pricing"
}
