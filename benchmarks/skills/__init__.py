"""A text-to-image run for two cores: composed captions, words in real fonts, and a judge that looks at the pixels."""
