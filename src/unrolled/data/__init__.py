"""Text becomes windows of ids. Knows no model and no recipe: it hands over integer tensors."""
