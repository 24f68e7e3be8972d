"""Networks and what surrounds them: UNet2DExtModel, conditioning, class embeddings, EMA."""
