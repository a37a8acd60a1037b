"""The field's analyses of what an SAE has learned, built on `evaluation`."""
