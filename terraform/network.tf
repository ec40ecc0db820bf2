# The network holds TPU hosts alone. They have no external address: SSH comes in through Identity-Aware Proxy, package
# downloads go out through NAT, and Google's own services are reached over private access.

locals {
  subnet_range = "10.8.0.0/20"     # 4,092 hosts: more than the largest pod has
  iap_range    = "35.235.240.0/20" # Identity-Aware Proxy forwards TCP from here and from nowhere else

  peer_ports = [
    "8471", # libtpu, between the hosts of a slice
    "8476", # libtpu, where the hosts of a slice agree on their mesh
    "8482", # jax.distributed's coordinator on a TPU
  ]
}

resource "google_compute_network" "this" {
  name                    = "parallax"
  auto_create_subnetworks = false

  depends_on = [google_project_service.required]
}

resource "google_compute_subnetwork" "this" {
  name                       = "parallax"
  network                    = google_compute_network.this.id
  region                     = local.region
  ip_cidr_range              = local.subnet_range
  private_ip_google_access   = true
  private_ipv6_google_access = "DISABLE_GOOGLE_ACCESS" # the subnet has no IPv6

  log_config {
    aggregation_interval = "INTERVAL_10_MIN" # who connected to whom, at the lowest price
    flow_sampling        = 0.1
    metadata             = "EXCLUDE_ALL_METADATA"
  }
}

resource "google_compute_firewall" "ssh_from_iap" {
  name          = "parallax-ssh-from-iap"
  description   = "SSH, through Identity-Aware Proxy only"
  network       = google_compute_network.this.id
  direction     = "INGRESS"
  source_ranges = [local.iap_range]

  allow {
    protocol = "tcp"
    ports    = ["22"]
  }

  log_config {
    metadata = "INCLUDE_ALL_METADATA"
  }
}

resource "google_compute_firewall" "peers" {
  name          = "parallax-peers"
  description   = "The hosts of one run to each other"
  network       = google_compute_network.this.id
  direction     = "INGRESS"
  source_ranges = [local.subnet_range]

  allow {
    protocol = "tcp"
    ports    = var.slices > 1 ? [] : local.peer_ports # libtpu's ports between slices are listed nowhere: all of TCP
  }
}

resource "google_compute_router" "this" {
  name    = "parallax"
  network = google_compute_network.this.id
  region  = local.region
}

resource "google_compute_router_nat" "this" {
  name                               = "parallax"
  router                             = google_compute_router.this.name
  region                             = local.region
  nat_ip_allocate_option             = "AUTO_ONLY"
  source_subnetwork_ip_ranges_to_nat = "LIST_OF_SUBNETWORKS"

  subnetwork {
    name                    = google_compute_subnetwork.this.id
    source_ip_ranges_to_nat = ["PRIMARY_IP_RANGE"]
  }

  log_config {
    enable = true
    filter = "ERRORS_ONLY"
  }
}
