"""Embedding images and measuring how well the embeddings verify people."""
