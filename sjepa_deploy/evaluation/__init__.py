"""Evaluates decoders over folds, seeds and recordings, and says whether the live decoder decodes what the model learned."""
