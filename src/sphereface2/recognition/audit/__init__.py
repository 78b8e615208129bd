"""What is wrong with a set of faces, and who is who in one without labels."""
