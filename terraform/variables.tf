variable "project_id" {
  description = "The Google Cloud project that owns and pays for everything."
  type        = string
  nullable    = false

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project_id))
    error_message = "project_id=${var.project_id} must be a project's id: 6 to 30 lower-case letters, digits and hyphens, a letter first; `gcloud projects list` shows it."
  }
}

variable "zone" {
  description = "Where the TPU is. Network and bucket follow it into its region, so the two cannot disagree."
  type        = string
  default     = "us-central1-a"
  nullable    = false

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+-[a-z]$", var.zone))
    error_message = "zone=${var.zone} must be a zone, such as us-central1-a, and not a region; `gcloud compute tpus locations list` shows them."
  }
}

variable "create_tpu" {
  description = "Whether to make the TPU. False makes the rest, for TPUs that scripts/launch.py starts and deletes."
  type        = bool
  default     = true
  nullable    = false
}

variable "tpu_name" {
  description = "What the TPU is called."
  type        = string
  default     = "parallax-dev-tpu"
  nullable    = false

  validation {
    condition     = can(regex("^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$", var.tpu_name))
    error_message = "tpu_name=${var.tpu_name} must have at most 63 lower-case letters, digits and hyphens, a letter first and no hyphen last; try parallax-dev-tpu."
  }
}

variable "accelerator" {
  description = "Generation and size, as Google writes them: v3-8, v4-32, v5litepod-16, v5p-64, v6e-8, tpu7x-8. The number counts cores, but chips for v5litepod and v6e."
  type        = string
  default     = "v3-8"
  nullable    = false

  validation {
    condition     = can(regex("^(v[234]|v5p|v5litepod|v6e|tpu7x)-[1-9][0-9]*$", var.accelerator))
    error_message = "accelerator=${var.accelerator} must be v2, v3, v4, v5litepod (which is v5e), v5p, v6e or tpu7x, a hyphen and a size; try v3-8."
  }

  validation {
    condition     = !can(regex("^(v5litepod|v6e)-[1-9]", var.accelerator)) || can(regex("-(1|4|8|16|32|64|128|256)$", var.accelerator))
    error_message = "accelerator=${var.accelerator} must have 1, 4, 8, 16, 32, 64, 128 or 256 chips; try v5litepod-8 or v6e-8."
  }

  validation {
    condition     = try(tonumber(regex("^(?:v[234]|v5p|tpu7x)-([0-9]+)$", var.accelerator)[0]) % 8 == 0, true)
    error_message = "accelerator=${var.accelerator} must have a multiple of 8 cores; try v3-8."
  }
}

variable "slices" {
  description = "How many of the accelerator one run uses, joined by the data-center network. Several are asked for together by scripts/launch.py, through a queued resource with --node-count, which Terraform's provider cannot ask for."
  type        = number
  default     = 1
  nullable    = false

  validation {
    condition     = var.slices >= 1 && var.slices <= 256 && floor(var.slices) == var.slices
    error_message = "slices=${var.slices} must be a whole number from 1 to 256; try 2."
  }

  validation {
    condition     = var.slices == 1 || !var.create_tpu
    error_message = "slices=${var.slices} cannot be made by Terraform, whose provider knows one slice only; add -var=create_tpu=false, and scripts/launch.py asks for all of them."
  }
}

variable "runtime" {
  description = "The runtime image of the TPU's hosts; null takes the one for the generation."
  type        = string
  default     = null

  validation {
    condition     = var.runtime == null || can(regex("^[a-z0-9][a-z0-9.-]*$", var.runtime))
    error_message = "runtime=${coalesce(var.runtime, "null")} must be an image's name; `gcloud compute tpus versions list --zone=${var.zone}` shows them."
  }

  validation {
    condition     = var.runtime == null || !contains(keys(local.runtimes), local.generation) || can(regex(local.runtimes[local.generation].fits, var.runtime))
    error_message = "runtime=${coalesce(var.runtime, "null")} must fit accelerator=${var.accelerator}; leave it out, or try ${try(local.runtimes[local.generation].default, "another accelerator")}."
  }
}

variable "spot" {
  description = "Whether to take a spot TPU: much cheaper, and Google may take it back at any moment."
  type        = bool
  default     = false
  nullable    = false
}

variable "bucket_name" {
  description = "The bucket's name, unique in the world; null takes PROJECT_ID-parallax."
  type        = string
  default     = null

  validation {
    condition     = var.bucket_name == null || can(regex("^[a-z0-9][a-z0-9_-]{1,61}[a-z0-9]$", var.bucket_name))
    error_message = "bucket_name=${coalesce(var.bucket_name, "null")} must have 3 to 63 lower-case letters, digits, hyphens and underscores, with no gs:// before it; try ${var.project_id}-parallax."
  }
}

variable "old_version_days" {
  description = "How many days the bucket keeps an object that was deleted or overwritten; they are billed as well."
  type        = number
  default     = 7
  nullable    = false

  validation {
    condition     = var.old_version_days >= 1 && floor(var.old_version_days) == var.old_version_days
    error_message = "old_version_days=${var.old_version_days} must be a whole number of at least 1; try 7."
  }
}

variable "labels" {
  description = "Labels on the bucket and the TPU beside app and managed-by, for the bill."
  type        = map(string)
  default     = {}
  nullable    = false

  validation {
    condition     = alltrue([for key, value in var.labels : can(regex("^[a-z][a-z0-9_-]{0,62}$", key)) && can(regex("^[a-z0-9_-]{0,63}$", value))])
    error_message = "labels must be lower-case letters, digits, hyphens and underscores, at most 63 of them, with a letter first in each key; try {team = \"research\"}."
  }
}
