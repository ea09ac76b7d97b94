"""Fields that are stacks of linear layers: recognised, evaluated by their own products, and compiled."""
