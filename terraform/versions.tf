terraform {
  required_version = ">= 1.9" # from there on a variable's validation may read other values

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "~> 7.45"
    }
    google-beta = {
      source  = "hashicorp/google-beta"
      version = "~> 7.45" # google_tpu_v2_vm exists only here
    }
  }
}
