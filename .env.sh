export PATH=/work/main/.venv/bin:$PATH PYTHONPATH=/work/wt/edit:/work/wt/edit/python BAP_KERNELS_WITH_CUDA=0 BAP_KERNELS_CACHE_DIR=/tmp/cache-edit
cd /work/wt/edit
