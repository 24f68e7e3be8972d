"""DDPMExtPipeline, guidance, and the saved folder."""
