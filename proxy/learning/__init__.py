"""How fast the cards really are: told by answers, kept in a file, measured on purpose."""
