"""Operations on tensors that the mathematics shares: reductions, nested structures, transforms, denormals."""
