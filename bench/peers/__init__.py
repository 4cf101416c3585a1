"""The peers: each as its own documentation shows, and as small as it can be."""
