"""Generated from proto/router/v1 by proto/generate.sh. Never edited by hand."""
