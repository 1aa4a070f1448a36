"""Read path of Promptyard: everything that a request touches. Importing it loads nothing heavy."""
