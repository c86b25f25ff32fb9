"""What the commands do: each calls one function of the package and prints its answer."""
