"""How the scores of a batch become its losses, where these are not the mean of those of its samples."""
