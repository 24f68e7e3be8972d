"""CompVis' conditioning stages (text, images) as modules of transformers and Diffusers, both ways.

A kind of conditioner is one module of this folder, with an entry in `.registry`.
"""
