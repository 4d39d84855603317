"""Where an extraction runs. Each engine has run(job, progress) -> ActivationStore; the core knows none of them."""
