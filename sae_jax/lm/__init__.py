"""Language models as sources of activations."""
