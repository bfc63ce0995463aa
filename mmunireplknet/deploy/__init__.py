"""From a trained model to one that runs elsewhere. Importing this imports no exporter and no runtime."""
