"""Open pretraining in JAX: raw documents to token shards, a staged run, a scored checkpoint and a conclusion."""

__version__ = "0.1.0"
