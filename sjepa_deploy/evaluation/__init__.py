"""Evaluates decoders: scores with intervals, and whether the live decoder decodes what the model learned."""
