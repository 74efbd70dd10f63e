"""What turns models into files that other machines run."""
