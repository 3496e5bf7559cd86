"""From a batch of structures to checked fields, neighbours and the graph of edges."""
