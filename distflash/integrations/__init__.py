"""What lets other libraries call this one; each module imports its library where it is used."""
