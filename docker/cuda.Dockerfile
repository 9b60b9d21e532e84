# docker build -f docker/cuda.Dockerfile -t tradespace-cuda . ; docker run --rm --gpus all -v tradespace:/cache tradespace-cuda doctor
# torch's wheels carry CUDA's libraries; the driver is the host's (nvidia-container-toolkit)
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir ".[engine,gpu]"
ENV TRADESPACE_HOME=/cache HF_HOME=/cache/huggingface NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /cache
RUN useradd --create-home tradespace && mkdir -p /cache && chown tradespace /cache
USER tradespace
ENTRYPOINT ["tradespace"]
CMD ["--help"]
