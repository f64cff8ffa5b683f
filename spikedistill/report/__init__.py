"""Reads run folders and models, and says what is in them."""
