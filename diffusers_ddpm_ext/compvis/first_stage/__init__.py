"""CompVis' autoencoders as first stages: their arguments and weights, to Diffusers' classes and back."""
