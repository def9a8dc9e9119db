// What PyTorch's C++ side asks of CUDA or MPS, answered for a build without it: one device, which is always idle, and pinned
// memory that is ordinary memory. fakecuda.py builds this and loads it before torch, which looks for the hooks once.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <mutex>
#include <set>

using namespace c10;

namespace {
template <DeviceType T>
struct Guard final : impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = T;
  static inline const Device device{T, 0};
  static inline const Stream stream{Stream::DEFAULT, device};
  DeviceType type() const override { return T; }
  Device exchangeDevice(Device) const override { return device; }
  Device getDevice() const override { return device; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return stream; }
  Stream getNewStream(Device, int) const override { return stream; }
  Stream exchangeStream(Stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};
impl::DeviceGuardImplRegistrar cuda(DeviceType::CUDA, new Guard<DeviceType::CUDA>());
impl::DeviceGuardImplRegistrar mps(DeviceType::MPS, new Guard<DeviceType::MPS>());

// Ordinary memory whose addresses are remembered.
struct PinnedMemory final : Allocator {
  static inline std::set<const void*> addresses;
  static inline std::mutex mutex;
  static bool contains(const void* address) {
    std::lock_guard<std::mutex> lock(mutex);
    return addresses.count(address) > 0;
  }
  static void release(void* address) {
    std::lock_guard<std::mutex> lock(mutex);
    addresses.erase(address);
    std::free(address);
  }
  DataPtr allocate(size_t size) override {
    void* address = std::aligned_alloc(64, (size / 64 + 1) * 64);
    std::lock_guard<std::mutex> lock(mutex);
    addresses.insert(address);
    return {address, address, &release, Device(DeviceType::CPU)};
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};
PinnedMemory pinned_memory;
bool is_mps = false; // which of the two is there
} // namespace

extern "C" void simulate_mps(bool yes) { is_mps = yes; }

namespace at {
struct FakeHooks final : CUDAHooksInterface {
  FakeHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return !is_mps; }
  bool isBuilt() const override { return !is_mps; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* address) const override { return PinnedMemory::contains(address); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  void deviceSynchronize(DeviceIndex) const override {}
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, FakeHooks)

struct FakeMPSHooks final : MPSHooksInterface {
  void init() const override {}
  bool hasMPS() const override { return is_mps; }
  bool isBuilt() const override { return is_mps; }
  bool isAvailable() const override { return is_mps; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
C10_REGISTER_CLASS(MPSHooksRegistry, MPSHooks, FakeMPSHooks)
} // namespace at
