"""The command line: parse, call one function, print. May import everything."""
