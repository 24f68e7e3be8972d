"""The Hugging Face Hub: upload, model card, proof of what was pushed."""
