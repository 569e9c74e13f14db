"""Images: from a file's bytes to its pixels, exactly as Pillow has them: formats, decoding, encoding, reading."""
