"""The documentation, and the program that writes its generated parts (`python -m docs.generate`)."""
