"""DDPMExtScheduler, its configuration, its CompVis API, and the adapter to other Diffusers schedulers."""
