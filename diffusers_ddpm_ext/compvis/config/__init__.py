"""CompVis and OpenAI configurations, translated to our options."""
