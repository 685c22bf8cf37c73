// From one declaration of an op to all that spells its arguments one by one: the schema, the dispatcher's typed handle
// and the flat functions that registrations take. An op is a struct, such as GatheredConv2d in gathered_conv2d.h:
//   kName, kSchema   the schema is what follows the name
//   Result           what it returns
//   Args<Int>        its arguments, an aggregate; `tie()` are its members in the schema's order
// Int is c10::SymInt above the backends, so that tracers can pass symbols, and int64_t in kernels.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymInt.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <regex>
#include <string>
#include <tuple>
#include <utility>

namespace bap_kernels {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalTensorList = c10::List<std::optional<at::Tensor>>;

inline bool has_value(const OptionalTensor& t) { return t.has_value() && t->defined(); }

// For arguments that hold references, where there is no tensor.
inline const OptionalTensor kAbsent;

namespace detail {

// How a flat function takes an argument: tensors by reference, everything else by value.
template <class T>
struct Flat {
  using type = T;
};
template <>
struct Flat<at::Tensor> {
  using type = const at::Tensor&;
};
template <>
struct Flat<OptionalTensor> {
  using type = const OptionalTensor&;
};
template <>
struct Flat<OptionalTensorList> {
  using type = const OptionalTensorList&;
};

template <class Result, class Members>
struct FlatFunction;
template <class Result, class... T>
struct FlatFunction<Result, std::tuple<const T&...>> {
  using Signature = Result(typename Flat<T>::type...);

  template <class Args, auto kKernel>
  static Result call(typename Flat<T>::type... members) {
    return kKernel(Args{std::move(members)...});
  }
};

template <class Op, class Args>
using OpFunction = FlatFunction<typename Op::Result, decltype(std::declval<const Args&>().tie())>;

template <class Kernel>
struct KernelArgs;
template <class Result, class Args>
struct KernelArgs<Result (*)(const Args&)> {
  using type = Args;
};

}  // namespace detail

// Calls the op through the dispatcher.
template <class Op>
typename Op::Result call(const typename Op::template Args<c10::SymInt>& args) {
  using Function = detail::OpFunction<Op, typename Op::template Args<c10::SymInt>>;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow((std::string("bap_kernels::") + Op::kName).c_str(), "")
                             .template typed<typename Function::Signature>();
  return std::apply([](const auto&... members) { return op.call(members...); }, args.tie());
}

// Declares the op's schema.
template <class Op>
void define(torch::Library& library) {
  library.def((std::string(Op::kName) + Op::kSchema).c_str());
}

// Registers `kKernel`, a function of Op::Args<Int>, for the library's dispatch key.
template <class Op, auto kKernel>
void implement(torch::Library& library) {
  using Args = typename detail::KernelArgs<decltype(kKernel)>::type;
  library.impl(Op::kName, &detail::OpFunction<Op, Args>::template call<Args, kKernel>);
}

// A name as a template argument.
template <size_t kSize>
struct OpName {
  char text[kSize];
  consteval OpName(const char (&name)[kSize]) { std::copy_n(name, kSize, text); }  // NOLINT: implicit
};

// Declares the private op by which a backend in Python computes `Op`: `first` are arguments of its own; those of `Op`
// follow, with plain integers and without defaults, which PyTorch would not pass on.
template <class Op>
void define_private(torch::Library& library, const std::string& name, const std::string& first,
                    const std::string& result) {
  const std::string schema = Op::kSchema;
  std::string members = schema.substr(1, schema.rfind(") ->") - 1);
  members = std::regex_replace(members, std::regex("SymInt"), "int");
  members = std::regex_replace(members, std::regex("=[^,]*"), "");
  library.def((name + "(" + first + members + ") -> " + result).c_str());
}

// Calls such an op; the arguments are its own, then `Op`'s members.
template <OpName kName, class Result, class... T>
Result call_private(const T&... arguments) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow((std::string("bap_kernels::") + kName.text).c_str(), "")
                             .template typed<Result(typename detail::Flat<T>::type...)>();
  return op.call(arguments...);
}

}  // namespace bap_kernels
