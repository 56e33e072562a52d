"""Preparing a data set: pictures and captions in, shards and a signed manifest out."""
