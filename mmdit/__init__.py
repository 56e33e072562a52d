"""The model as a plain torch library: transformer, rectified flow, conditioning, sampling, export."""
