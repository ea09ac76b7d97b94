"""What a torchdyn field takes, holds and returns: signatures, columns, placeholders, buffers."""
