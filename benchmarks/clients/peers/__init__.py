"""
The peers' programs. Each runs where only its own library is installed, and most libraries have no
types: these modules are not type-checked.
"""
