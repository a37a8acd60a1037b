"""Semi-nonnegative factorisation of activations: neuron groups instead of an SAE.

Shafran, Ronen, Fahn, Ravfogel, Geiger, Geva 2025, arXiv:2506.10920: hidden units of an
MLP become sums of groups of few neurons. `factors` has the factorisation, `starts`
where it begins, `levels` groups of groups.
"""
