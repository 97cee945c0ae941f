"""One module per ecosystem that fastadam meets; each imports its ecosystem itself."""
