"""The Accelerate engine: from options and images to a trained, saved pipeline.

Nothing is imported here, so that ``train.py --help`` stays fast.
"""
